// What this peer makes of hostile bytes: one JSON line per line on stdin, `{"kind", "data", "made"?}`; answers alike.

import { createInterface } from 'node:readline'
import { openAdvert } from './advert.mjs'
import { Machine, unpackHeader } from './frames.mjs'

const [nowMs, frameBytesMax] = process.argv.slice(2).map(Number)

const readers = {
  adverts: data => openAdvert(data, nowMs).peer_id,
  headers: data => Object.keys(unpackHeader(data)).length,
  frames: (data, made) => {
    const machine = new Machine(frameBytesMax)
    for (let count = 0; count < made; count++) machine.request('echo', {}, [], 1000)
    return machine.feed(data).map(({ kind }) => kind)
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  const { kind, data, made } = JSON.parse(line)
  let verdict
  try {
    verdict = { read: readers[kind](Buffer.from(data, 'hex'), made) }
  } catch (error) {
    verdict = { refused: error.kind ?? error.rule ?? `${error.name}: ${error.message}` }
  }
  process.stdout.write(JSON.stringify(verdict) + '\n')
}
