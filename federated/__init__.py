"""FedSweep. Imports point one way, from the scripts to the ground; tests/test_rooms.py says which room may import which."""
