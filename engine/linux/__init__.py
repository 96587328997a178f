"""One small module a kernel interface; only what the engine uses, no policy."""
