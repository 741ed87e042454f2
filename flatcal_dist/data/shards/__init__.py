"""Shards: tars of images, local or remote, indexed or streamed."""
