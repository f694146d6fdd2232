"""Evidence: what was decided, done and stopped, as chains of records that nobody can change unseen; pure.

`chain` links records, `checkpoint` signs their heads, `bodies` says what each kind of record holds, `verify` replays.
"""
