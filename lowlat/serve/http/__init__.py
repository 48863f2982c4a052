"""HTTP: access control, login, connection and body limits, errors, logs, SSE, worker threads."""
