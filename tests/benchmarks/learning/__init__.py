"""Tests of the learning studies. They are not part of the source distribution."""
