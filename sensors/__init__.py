"""What starts work by itself. Nothing is re-exported here."""
