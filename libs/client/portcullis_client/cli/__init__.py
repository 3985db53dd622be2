"""The command line `portcullis`."""
