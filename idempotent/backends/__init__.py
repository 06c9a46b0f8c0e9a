"""Where records live. Each backend is imported when it is first named."""
