"""What loggers are shown."""
