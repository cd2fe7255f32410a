"""What each verb of the command line takes and does: its options, and the one function it calls.

Verbs import what they need when they run, so that ``--help`` answers at once.
"""
