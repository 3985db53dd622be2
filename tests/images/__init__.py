"""Images, built and run for real: `./run images`."""
