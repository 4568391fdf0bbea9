"""What runs when: admission, the queue, budgets, and the rebuilding of the queue from the dataset."""
