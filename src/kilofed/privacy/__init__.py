"""What happens to an update before anyone may see it."""
