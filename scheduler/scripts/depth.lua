-- How much is where.
-- KEYS[1]  prefix of the namespace
-- reply    ready live, ready bulk, leased, delayed, dead letters
local prefix = KEYS[1]
return {
  redis.call('ZCARD', prefix .. ':ready:live'),
  redis.call('ZCARD', prefix .. ':ready:bulk'),
  redis.call('ZCARD', prefix .. ':leased'),
  redis.call('ZCARD', prefix .. ':delayed'),
  redis.call('HLEN', prefix .. ':dead'),
}
