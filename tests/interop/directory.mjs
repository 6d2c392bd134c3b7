// Keys of provider records: docs/protocol.md, "The DHT".

import { createHash } from 'node:crypto'

const MULTIHASH = Buffer.from('1220', 'hex')
const SHARD_TAG = Buffer.from('rios/shard/1\0')

export function modelKey (model) {
  return Buffer.concat([MULTIHASH, Buffer.from(model, 'hex')])
}

export function shardKey (model, index) {
  const number = Buffer.alloc(4)
  number.writeUInt32BE(index)
  const digest = createHash('sha256').update(SHARD_TAG).update(Buffer.from(model, 'hex')).update(number).digest()
  return Buffer.concat([MULTIHASH, digest])
}
