"""The daemon of a site."""
