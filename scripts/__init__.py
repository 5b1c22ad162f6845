"""The countersign command and the tools around it."""
