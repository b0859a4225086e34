"""The server of mounted directories, attacked by a client that speaks 9p2000.L byte by byte; no VM."""
