"""What is said over HTTP /v1: the schemas that coordinator, agents and clients share; no I/O.

`sites`, `links`, `transfers`, `plans`, `policies`, `people`, `evidence` and `events` hold what users read and write,
`agents` what an agent and the coordinator tell each other, `schema` what all of these are made of, `problems` how errors
are answered.

Times are UTC with a zone, sizes bytes, rates bits a second. Paths are text: what is not UTF-8 travels as
`surrogateescape` would show it, escaped by `units.show_path`, and cannot be asked for by name.
"""

from __future__ import annotations
