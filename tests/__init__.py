"""The tests mirror chronos/; conftest.py describes what they run on."""
