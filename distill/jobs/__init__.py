"""What a configuration file asks for."""
