"""What tests of several folders share. No test imports another."""
