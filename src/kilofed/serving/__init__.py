"""A model behind an OpenAI-compatible API.

model.py (what is served), asks.py (what a client wants, checked), work.py (its steps), desk.py (who is decoded when),
answers.py (what a client gets), doors.py (who may come in), meters.py (counts), app.py (the routes), page.html (a chat).
"""
