"""What is wrong with a configuration: keys that nothing reads, values that do not fit together."""
