# What every Ray process of a cluster of machines needs in its environment. launcher.yaml sources it on every node
# before `ray start`; source it too before `dprlhf run`.

# The same token on every node, in a file that only its owner can read: launcher.yaml copies it. Without it Ray refuses
# to start, and refuses every connection.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$HOME/.ray/auth_token"

# Encrypts what Ray's processes say to each other, prompts and the token included. Each node has a certificate of its
# own (its IP address as subject alternative name) by one authority: see README.md. Take these four lines out only where
# something else encrypts the network (WireGuard, IPsec), and on all nodes: nodes with and without do not talk.
export RAY_USE_TLS=1
export RAY_TLS_SERVER_CERT=/etc/dprlhf/tls/tls.crt
export RAY_TLS_SERVER_KEY=/etc/dprlhf/tls/tls.key
export RAY_TLS_CA_CERT=/etc/dprlhf/tls/ca.crt

# As dprlhf_ray/actors/cluster.py sets them on one machine.
export RAY_TRAIN_V2_ENABLED=1
export RAY_USAGE_STATS_ENABLED=0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0

export PATH="$HOME/venv/bin:$PATH"
export TMPDIR=/mnt/dprlhf/tmp            # in memory, see launcher.yaml
export HF_HOME=/shared/huggingface       # the base model, at one path on all nodes
ulimit -c 0                              # no core dump: it would write private records to disk
