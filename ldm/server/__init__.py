"""A page to generate with, in a browser: the queue of jobs, its HTTP API, and what is asked of each request."""
