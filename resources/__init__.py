"""The doors to the outside: each a Dagster resource with one small interface and implementations."""
