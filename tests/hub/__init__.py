"""Tests of push, pull and merge against a loopback Hub."""
