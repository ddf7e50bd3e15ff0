"""The server, asked by real clients. No model is tested here."""
