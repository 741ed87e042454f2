"""What is kept of every evaluated image, and tables from elsewhere that become the same."""
