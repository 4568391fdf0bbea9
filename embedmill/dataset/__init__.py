"""The dataset: what is true, as objects that are created once and never changed."""
