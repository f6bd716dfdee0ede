# Weir's image: two static programs and nothing else. `make image` builds them and puts
# them beside this file. The API server's certificate authority comes with the pod's
# service account, so there are no root certificates here.
FROM scratch
COPY weir weir-cni /
ENTRYPOINT ["/weir"]
