"""What a run did, from one record: ``report.json`` for machines, the model card for people."""
