"""The tests; they mirror chronos/, and conftest.py says what they run on."""
