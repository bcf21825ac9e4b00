"""Helpers of several test files; no tests here."""
