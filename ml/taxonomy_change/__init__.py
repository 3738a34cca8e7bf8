"""What happens when the catalog taxonomy changes: sources, the diff, where labels go, new categories."""
