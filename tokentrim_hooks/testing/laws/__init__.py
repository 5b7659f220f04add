"""What every adapter must hold to, a file for each kind of law; mixed together by the conformance kit."""
