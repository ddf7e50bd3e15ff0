"""Tests of generation: against the release, and each way of running against the plain one."""
