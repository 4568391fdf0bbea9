"""Where documents come from: files, folders, standard input, and the documentation that Python carries."""
