"""Every named place between two steps, and what happens when a process dies, hangs or errs there."""
