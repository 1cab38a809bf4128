"""Who decides the policies: the port, and its implementations."""
