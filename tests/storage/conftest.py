"""The S3 server is one fixture for all files of this room: imported here, it is started once a session."""

from tests.s3_server import s3_server as s3_server
