"""A cluster on paper: schedules of pipelines as plans, and what a step of any layout takes and needs."""
