"""How we speak to Temporal: one plugin for client, worker, replayer and tests."""
