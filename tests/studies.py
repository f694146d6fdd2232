"""A policy about the data of a study: each test adds its rules."""

from __future__ import annotations

STUDY = """
[policy]
id          = "study"
version     = "1"
title       = "A study"
owner       = "dac@example.org"
applies_to  = ["data.labels includes 'study'"]
effective   = 2020-01-01
review_by   = 2099-01-01
"""
"""The head of such a policy; what follows may add to it before the first rule."""
