// Adverts: docs/protocol.md, "Adverts".

import { decode, encode } from '@msgpack/msgpack'
import { publicKeyOf, verify } from './identity.mjs'

const TAG = Buffer.from('rios/advert/1\0')
const BYTES_MAX = 64 << 10
const LIFE_MS_MAX = 24 * 3600 * 1000
const SKEW_MS_MAX = 10 * 60 * 1000
const COUNT_MAX = 1n << 62n

const text = (max = 256) => value => typeof value === 'string' && [...value].length <= max
const count = value => (typeof value === 'bigint' || Number.isInteger(value)) && value >= 0 && BigInt(value) <= COUNT_MAX
const bytes = max => value => value instanceof Uint8Array && value.length <= max
const flag = value => typeof value === 'boolean'
const list = (item, max) => value => Array.isArray(value) && value.length <= max && value.every(item)
const record = fields => value => Array.isArray(value) && value.length >= fields.length && fields.every(([, valid], index) => valid(value[index]))

const GPU = [['name', text()], ['memory_bytes', count]]
const HARDWARE = [
  ['cpu', text()], ['cores', count], ['ram_bytes', count], ['gpus', list(record(GPU), 64)],
  ['expert_kflop_per_s', count], ['memory_bytes_per_s', count]
]
const OFFER = [
  ['model_id', value => text(64)(value) && value.length === 64], ['shards', bytes(8192)], ['quote', count],
  ['microcredits_per_tflop', count], ['microcredits_per_kv_unit', count]
]
const FIELDS = [
  ['peer_id', text()], ['seq', count], ['expires_ms', count], ['addresses', list(text(), 16)], ['lane', text()],
  ['version', text()], ['region', text()], ['hardware', record(HARDWARE)], ['disk_bytes', count], ['offered_bytes', count],
  ['full', flag], ['load', count], ['roles', list(text(), 16)], ['models', list(record(OFFER), 64)], ['net', bytes(BYTES_MAX)]
]

export function signAdvert (identity, fields) {
  const defaults = {
    addresses: [], lane: '', version: '', region: '', hardware: ['', 0, 0, [], 0, 0], disk_bytes: 0, offered_bytes: 0,
    full: false, load: 0, roles: [], models: [], net: new Uint8Array()
  }
  const all = { ...defaults, peer_id: identity.peerId, ...fields }
  const body = Buffer.from(encode(FIELDS.map(([name]) => all[name]), { useBigInt64: true }))
  return Buffer.from(encode([body, identity.sign(TAG, body)]))
}

export function openAdvert (data, nowMs) {
  if (data.length > BYTES_MAX) throw new Error('too_large')
  const [body, signature] = strictArray(data, 2)
  if (!(body instanceof Uint8Array) || !(signature instanceof Uint8Array)) throw new Error('malformed')
  const values = strictArray(body)
  if (!record(FIELDS)(values)) throw new Error('malformed')
  const advert = Object.fromEntries(FIELDS.map(([name], index) => [name, values[index]]))
  if (!verify(publicKeyOf(advert.peer_id), TAG, body, signature)) throw new Error('signature')
  const now = BigInt(nowMs)
  if (BigInt(advert.expires_ms) <= now) throw new Error('expired')
  if (BigInt(advert.expires_ms) - now > LIFE_MS_MAX + SKEW_MS_MAX || BigInt(advert.seq) > now + BigInt(SKEW_MS_MAX)) throw new Error('future')
  return advert
}

function strictArray (data, size) {
  let value
  try {
    value = decode(data, { useBigInt64: true })
  } catch (error) {
    throw new Error(`malformed: ${error.message}`)
  }
  if (!Array.isArray(value) || (size !== undefined && value.length !== size)) throw new Error('malformed')
  return value
}
