"""The corpus room: documents in, a manifest of token sequences out.

In the order of the data: `config` (what to read), `sources` (which files that means), `readers` and `python_text`
(files to records), `render` (records to text with the spans to learn), `encode` (text to ids and loss masks),
`windows` (long documents to sequences), `ingest` (the flow, the counts, the manifest).
"""
