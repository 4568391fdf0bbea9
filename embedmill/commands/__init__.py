"""The command line: the only place where the services are wired together."""
