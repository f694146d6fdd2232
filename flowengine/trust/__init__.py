"""Who is who and who may do what: certificates, tokens, grants, receipts, fences; no I/O, no clock.

Every function is given the time (`now`, Unix seconds) and where it needs them random bytes (`rng`, a function from a
count to so many bytes; `os.urandom` outside tests). docs/spec/trust.md describes the bytes.
"""

from __future__ import annotations
