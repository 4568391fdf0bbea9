"""The real queue, admission, workers and dataset in one thread, on virtual time, under faults that a seed draws."""
