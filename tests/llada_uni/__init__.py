"""Tests of the applications, called as users call them."""
