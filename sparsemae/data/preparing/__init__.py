"""What happens to a volume between its file and the store."""
