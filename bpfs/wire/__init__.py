"""What travels between master and slaves: messages, codec, links."""
