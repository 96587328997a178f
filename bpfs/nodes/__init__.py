"""The nodes as the master knows them."""
